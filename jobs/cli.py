"""The command `moray VERB …`. What goes wrong is one line on standard error and an exit code, never a traceback.

1: the workers failed for good; 2: a user's mistake; 75: stopped on request, resumable; 130: cut off by Ctrl-C.
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial, wraps
from inspect import cleandoc, signature
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from jobs.nearest import nearest

EXIT_FAILED, EXIT_MISTAKE, EXIT_KILLED_BY_KEYBOARD = 1, 2, 130  # and 75: cluster.worker.EXIT_INTERRUPTED
RANK_0_TELLS_S = 5.0
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""What a system answers for a path that this user cannot read or write."""

# The modules behind the verbs import torch and more: each is loaded only when its verb is asked for.


def prepare(
    sources: tyro.conf.Positional[tuple[str, ...]] = ("stdlib",),
    *,
    out: Path,
    vocab_size: int = 6400,
    tokenizer: Path | None = None,
    validation: float = 0.01,
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Turn text into a dataset: tokenizer, shuffled WebDataset shards and their index.

    Args:
        sources: stdlib, folders (.py .md .rst .txt), .txt, .jsonl[.gz|.zst], .parquet or WebDataset .tar files.
        out: The folder to make.
        vocab_size: Entries of the byte-level BPE that is trained.
        tokenizer: A folder with an existing tokenizer to use instead.
        validation: Share of the documents held out for validation, by hash of their key.
        seed: Decides on the documents' order.
        overwrite: Replace a finished dataset in `out`.
    """
    from jobs.prepare import prepare as run

    run(
        sources,
        out,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        validation=validation,
        seed=seed,
        overwrite=overwrite,
    )
    return 0


def pretrain(arguments: list[str]) -> int:
    """Train or resume: `[--recipe NAME|FILE.toml] --data.path DIR --run.dir RUN [--section.key value …]`.

    `--model.preset` (`moray inspect NAME` shows one) is where the architecture's fields start from.
    `--model.from DIR` takes them, and the first weights, from a Hugging Face folder or another run instead.
    The command line wins over the recipe, the recipe over the preset. A recipe is TOML with the tables below;
    in brackets is what holds where none of them speaks.
    """
    from jobs.config import RunConfig, load_config
    from jobs.settings_help import show_settings

    if {"-h", "--help"} & set(arguments):
        show_settings(RunConfig, cleandoc(pretrain.__doc__ or ""), Console())
        return 0
    recipe, overrides = parse_settings(arguments)
    config = load_config(recipe, overrides)
    from jobs.pretrain import pretrain as run

    return run(config)


def parse_settings(arguments: list[str]) -> tuple[str | None, dict[str, str]]:
    """`--recipe R --section.key value --section.key=value` -> (R, {"section.key": "value"}); dashes are underscores."""
    recipe, overrides = None, {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"{flag} was not expected; settings are written --section.key value")
        name, equals, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name} needs a value")
            value = rest.pop(0)
        if name == "recipe":
            recipe = value
        else:
            overrides[name] = value
    return recipe, overrides


def generate(
    run: tyro.conf.Positional[Path],
    *,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> int:
    """Continue a prompt with a run's newest commit, or with a Hugging Face folder.

    Args:
        run: The run's folder, or the Hugging Face one.
        prompt: The text to continue.
        max_new_tokens: The most tokens to add.
        temperature: 0 always takes the likeliest token.
        top_k: Draw among the k likeliest; 0: among all.
        top_p: Draw among the fewest likeliest whose probabilities reach p.
        seed: Decides on the draws.
    """
    from jobs.generate import Sampling, generate_tokens, load_run, stream_text

    sampling = Sampling(temperature, top_k, top_p, seed)
    decoder, tokenizer = load_run(run, complain)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    tokens = generate_tokens(decoder, ids, max_new_tokens, sampling)
    print(prompt, end="", flush=True)
    for text in stream_text(tokenizer, tokens):
        print(text, end="", flush=True)
    print()
    return 0


def export(run: tyro.conf.Positional[Path], *, out: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> int:
    """Write a run's newest commit as a Hugging Face folder that transformers loads and serves.

    Args:
        run: The run's folder.
        out: The folder to make.
        dtype: What the weights are rounded to.
    """
    import torch

    from jobs.export import export as run_export

    model_type = run_export(run, out, getattr(torch, dtype), complain)
    print(f"{out}: a Hugging Face folder of model_type {model_type}")
    return 0


def upcycle(
    source: tyro.conf.Positional[Path],
    *,
    out: Path,
    experts: int,
    top_k: int,
    shared: int = 0,
    noise: float = 0.0,
    granularity: int = 1,
    seed: int = 0,
) -> int:
    """Make experts of a dense model's feed-forward networks: weights to start a MoE run from.

    Args:
        source: A run, or a Hugging Face folder.
        out: The folder to make; `moray pretrain --model.from` starts from it.
        experts: Routed experts of every layer.
        top_k: Routed experts per token.
        shared: Experts that every token passes.
        noise: Deviation of the noise on each expert's matrices, in deviations of the matrix itself.
        granularity: Experts that make up one dense network; each is that much narrower.
        seed: Decides on the noise and on the routers.
    """
    from jobs.upcycle import upcycle as run_upcycle
    from model.upcycle import Upcycling

    options = Upcycling(experts, top_k, shared, noise, granularity, seed)
    run_upcycle(source, options, out, Console(highlight=False), complain)
    return 0


def checkpoints(run: tyro.conf.Positional[Path], *, verify: bool = False) -> int:
    """List a run's commits.

    Args:
        run: The run's folder.
        verify: Read every byte and compare it with the manifest.
    """
    from jobs.checkpoints import show_checkpoints

    return show_checkpoints(run, verify, Console())


def inspect(source: tyro.conf.Positional[str], *, seq_len: int | None = None, json: bool = False) -> int:
    """Show a model's architecture, parameters, FLOPs and memory, without building it.

    Args:
        source: A preset, a run or a Hugging Face folder.
        seq_len: Tokens of a sequence; by default 4096, or the model's longest.
        json: Print everything as JSON.
    """
    from jobs.inspect_model import inspect_model

    inspect_model(source, seq_len, as_json=json, console=Console(highlight=False))
    return 0


def demo(*, dir: Annotated[Path, tyro.conf.arg(name="dir")] = Path("moray-demo")) -> int:
    """Prepare the standard library, train a small MoE on 4 workers, kill one, recover, and generate text.

    Args:
        dir: Where everything is put.
    """
    from jobs.demo import demo as run

    return run(dir)


VERBS: dict[str, Callable[..., int]] = {
    "prepare": prepare,
    "pretrain": pretrain,
    "generate": generate,
    "checkpoints": checkpoints,
    "inspect": inspect,
    "export": export,
    "upcycle": upcycle,
    "demo": demo,
}


def dispatch(arguments: list[str]) -> int:
    """Runs a verb and returns its exit code. Raises ValueError for a user's mistake."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
        print("\n".join(["usage: moray VERB …    (moray VERB --help says more)", "", *lines]))
        return 0
    name, *rest = arguments
    if name not in VERBS:
        raise ValueError(f"{name} is not a verb of moray; there are {', '.join(VERBS)}")
    if name == "pretrain":
        return pretrain(rest)
    return bind(name, rest)()


def bind(name: str, arguments: list[str]) -> Callable[[], int]:
    """A verb with its arguments, ready to be called. Raises ValueError of one line where they do not fit."""
    verb = VERBS[name]
    _check_options(name, arguments)

    @wraps(verb)
    def keep(*values: Any, **options: Any) -> Callable[[], int]:
        return partial(verb, *values, **options)

    with redirect_stderr(StringIO()) as said:
        try:
            return tyro.cli(keep, args=arguments, prog=f"moray {name}")
        except SystemExit as end:
            if not end.code:  # --help
                raise
    raise ValueError(f"{_condense(said.getvalue())}; `moray {name} --help` says more")


def _check_options(verb: str, arguments: list[str]) -> None:
    kinds = signature(VERBS[verb]).parameters.values()
    known = {f"--{kind.name.replace('_', '-')}": kind for kind in kinds if kind.kind is kind.KEYWORD_ONLY}
    switches = {f"--no-{name[2:]}" for name, kind in known.items() if isinstance(kind.default, bool)}
    for word in arguments:
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in {*known, *switches, "--help"}:
            raise ValueError(f"{option} is not an option of moray {verb}; {nearest(option, list(known))}")


def _condense(box: str) -> str:
    """What is wrong, out of the box of several lines in which tyro says it: all above the first rule, but for help."""
    lines = [line[2:-2].rstrip() for line in box.splitlines() if line.startswith("│")]
    told = takewhile(lambda line: not line.startswith("─"), lines)
    return " ".join(line.strip() for line in told if not line.startswith(" " * 8)).rstrip(".")


def main() -> None:
    try:
        code = dispatch(sys.argv[1:])
    except ValueError as error:
        if os.environ.get("RANK", "0") != "0":
            # Under torchrun every rank finds most mistakes: rank 0 tells, and torchrun then ends the others.
            time.sleep(RANK_0_TELLS_S)
        complain(str(error))
        code = EXIT_MISTAKE
    except KeyboardInterrupt:
        complain("interrupted; of a run, the newest commit stands, and the same command resumes from it")
        code = EXIT_KILLED_BY_KEYBOARD
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            complain(f"the disk is full: {error}; free space and give the same command again")
        elif error.errno in NOT_OURS:
            complain(f"{error.filename}: {error.strerror}; choose another path, or change who may use it")
        else:
            raise
        code = EXIT_MISTAKE
    except (RuntimeError, FloatingPointError) as error:
        from cluster.worker import WorkerError  # imports torch, as did whoever raised this
        from parallel.checkpoint import CommitError

        if not isinstance(error, WorkerError | CommitError | FloatingPointError):
            raise
        complain(str(error))
        code = EXIT_FAILED
    sys.exit(code)


def complain(message: str) -> None:
    print(f"moray: {message}", file=sys.stderr)
