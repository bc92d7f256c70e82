"""`moray generate`."""

from pathlib import Path

import tyro

from moray.jobs.verbs.say import complain


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
    from moray.jobs.generation.generate import Sampling, generate_tokens, load_run, stream_text

    sampling = Sampling(temperature, top_k, top_p, seed)
    decoder, tokenizer = load_run(run, complain)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    tokens = generate_tokens(decoder, ids, max_new_tokens, sampling)
    print(prompt, end="", flush=True)
    for text in stream_text(tokenizer, tokens):
        print(text, end="", flush=True)
    print()
    return 0
