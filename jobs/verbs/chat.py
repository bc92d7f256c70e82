"""`moray chat`."""

from pathlib import Path

import tyro

from moray.jobs.verbs.say import complain


def chat(
    run: tyro.conf.Positional[Path],
    *,
    system: str = "",
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> int:
    """Talk with a run's newest commit, or with a Hugging Face folder, in the terminal.

    Args:
        run: The run's folder, or the Hugging Face one.
        system: The system prompt.
        max_new_tokens: The most tokens of an answer; by default as many as the model has room for.
        temperature: 0 always takes the likeliest token.
        top_k: Draw among the k likeliest; 0: among all.
        top_p: Draw among the fewest likeliest whose probabilities reach p.
        seed: Decides on the draws; each answer draws anew.
    """
    from moray.jobs.config.arguments import check_utf8
    from moray.jobs.generation.chat import chat as run_chat
    from moray.jobs.generation.generate import Sampling

    check_utf8("system", system)
    return run_chat(run, Sampling(temperature, top_k, top_p, seed), system, max_new_tokens, complain)
