"""`moray generate`."""

from pathlib import Path
from typing import Literal

import tyro

from moray.jobs.verbs.say import complain


def generate(
    run: tyro.conf.Positional[Path],
    *,
    prompt: str,
    bos: Literal["auto", "yes", "no"] = "auto",
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> int:
    """Continue a prompt with a run's newest commit, or with a Hugging Face folder.

    Args:
        run: The run's folder, or the Hugging Face one.
        prompt: The text to continue.
        bos: Whether BOS comes before the prompt. auto: as before a run's documents, or as a Hugging Face folder's
            tokenizer does by default.
        max_new_tokens: The most tokens to add; by default 200, or what the model has room for.
        temperature: 0 always takes the likeliest token.
        top_k: Draw among the k likeliest; 0: among all.
        top_p: Draw among the fewest likeliest whose probabilities reach p.
        seed: Decides on the draws.
    """
    from moray.jobs.config.arguments import check_utf8
    from moray.jobs.generation.generate import Sampling, generate_tokens, load_run, prompt_start, stream_text

    check_utf8("prompt", prompt)
    sampling = Sampling(temperature, top_k, top_p, seed)
    decoder, tokenizer = load_run(run, complain)
    ids = tokenizer.encode(prompt)
    tokens = generate_tokens(decoder, [*prompt_start(tokenizer, bos), *ids], max_new_tokens, sampling)
    print(prompt, end="", flush=True)
    for text in stream_text(tokenizer, tokens, ids):
        print(text, end="", flush=True)
    print()
    return 0
