/* NVML's C interface, as far as moray asks: a machine with three GPUs, the third fallen off its bus. */
#include <string.h>

typedef struct gpu { int index; } *device;
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process;

enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };
static struct gpu gpus[] = {{0}, {1}, {2}};

int nvmlInitWithFlags(unsigned flags) { return OK; }
int nvmlInit_v2(void) { return OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == GPU_IS_LOST ? "GPU is lost" : "an error"; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { strncpy(out, "575.51.03", size); return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *out) {
    *out = &gpus[index];
    return index == 2 ? GPU_IS_LOST : OK;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device *out) {
    *out = &gpus[0];
    return strcmp(uuid, "GPU-zero") ? INVALID_ARGUMENT : OK;
}
int nvmlDeviceGetName(device gpu, char *out, unsigned size) { strncpy(out, "Stand-in 80GB", size); return OK; }
int nvmlDeviceGetUUID(device gpu, char *out, unsigned size) {
    strncpy(out, gpu->index ? "GPU-one" : "GPU-zero", size);
    return OK;
}
int nvmlDeviceGetMemoryInfo(device gpu, memory *out) {
    *out = (memory){80ULL << 30, 50ULL << 30, 30ULL << 30};
    return OK;
}
int nvmlDeviceGetTemperature(device gpu, unsigned sensor, unsigned *out) { *out = 61 + 30 * gpu->index; return OK; }
int nvmlDeviceGetPowerUsage(device gpu, unsigned *out) { *out = 412500; return gpu->index ? NOT_SUPPORTED : OK; }
int nvmlDeviceGetEnforcedPowerLimit(device gpu, unsigned *out) { *out = 700000; return OK; }
/* The power limit; on the second one heat, by hardware and by software. An older driver: no ...EventReasons. */
int nvmlDeviceGetCurrentClocksThrottleReasons(device gpu, unsigned long long *out) {
    *out = gpu->index ? 0x60 : 0x4;
    return OK;
}
int nvmlDeviceGetTotalEccErrors(device gpu, unsigned type, unsigned counter, unsigned long long *out) {
    *out = type == 1 && counter == 0 ? 7 : 1000;
    return gpu->index ? OK : NOT_SUPPORTED;
}
int nvmlDeviceGetCurrPcieLinkWidth(device gpu, unsigned *out) { *out = gpu->index ? 4 : 16; return OK; }
int nvmlDeviceGetMaxPcieLinkWidth(device gpu, unsigned *out) { *out = 16; return OK; }
int nvmlDeviceGetNvLinkState(device gpu, unsigned link, unsigned *active) {
    *active = link != 1; /* three links, one of them down */
    return link < 3 ? OK : INVALID_ARGUMENT;
}
int nvmlDeviceGetP2PStatus(device a, device b, int what, int *out) { *out = a->index > b->index; return OK; }
int nvmlDeviceGetTopologyCommonAncestor(device a, device b, int *out) { *out = 30; return OK; }
int nvmlDeviceGetComputeRunningProcesses_v3(device gpu, unsigned *count, process *out) {
    if (gpu->index) { *count = 0; return OK; }
    if (!out || *count < 2) { *count = 2; return INSUFFICIENT_SIZE; }
    *count = 2;
    out[0] = (process){4711, 3ULL << 30, ~0u, ~0u};
    out[1] = (process){4712, ~0ULL, ~0u, ~0u}; /* memory is not told */
    return OK;
}
