"""Tokens of rollouts in a CPU second, beside transformers' generate on the same exported model in the same run.

    python benchmarks/rollout.py [--presets demo-dense demo-moe minimind-3] [--rounds 3] [--new 128]

Both draw as many answers to the same prompts, of uneven lengths, at the same temperature, and stop nowhere. They take
turns; a ratio is the median over the rounds.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers

from moray.model import Decoder, ModelConfig, initialise
from moray.model.hf import save_pretrained
from moray.parallel.rollout import Sampling, rollout

TEMPERATURE = 0.8


def cpu_seconds(do: Callable[[], object]) -> float:
    started = time.process_time()
    do()
    return time.process_time() - started


def measured(preset: str, prompts: list[np.ndarray], sampling: Sampling, rounds: int) -> str:
    decoder = Decoder(ModelConfig.preset(preset))
    initialise(decoder, 0)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(decoder, folder)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    peer.generation_config.eos_token_id = None
    width = max(map(len, prompts))
    padded_PT, real_PT = (torch.zeros(len(prompts), width, dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        padded_PT[row, -len(prompt) :] = torch.from_numpy(prompt)
        real_PT[row, -len(prompt) :] = 1

    def ours() -> None:
        answers = rollout(decoder, prompts, range(len(prompts)), sampling, seed=0, step=0)
        assert all(len(answer.tokens) == sampling.max_new_tokens for group in answers for answer in group)

    @torch.inference_mode()
    def theirs() -> None:
        found = peer.generate(
            padded_PT,
            attention_mask=real_PT,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            num_return_sequences=sampling.group_size,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=0,
        )
        assert found.shape == (sampling.samples_per_batch, width + sampling.max_new_tokens)

    times = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(rounds + 1)][1:]
    tokens = sampling.samples_per_batch * sampling.max_new_tokens
    own, other = (tokens / statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    return f"{preset}: {own:,.0f} tokens a CPU second, transformers {other:,.0f}: {ratio:.2f} times as many"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["demo-dense", "demo-moe", "minimind-3"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 6400, n) for n in draw.integers(16, 64, options.prompts)]
    sampling = Sampling(TEMPERATURE, options.new, (), options.group, options.prompts)
    for preset in options.presets:
        print(measured(preset, prompts, sampling, options.rounds), flush=True)


if __name__ == "__main__":
    main()
