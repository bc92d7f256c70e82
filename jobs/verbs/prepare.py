"""`moray prepare`."""

from inspect import cleandoc

from rich.console import Console


def prepare(arguments: list[str]) -> int:
    """Turn text into a dataset: `SOURCE … --out DATA [--setting value …]`.

    DATA gets a tokenizer, shuffled WebDataset shards and their index.

    `--recipe NAME|FILE.toml` says what is done to text on the way: web, books, chat, none (the default), or TOML with
    any of these settings.

    The command line wins over the recipe; in brackets is what holds where neither speaks.
    """
    from moray.jobs.config.arguments import parse_settings, split_words
    from moray.jobs.config.settings_help import show_settings
    from moray.jobs.datasets.config import PrepareConfig, load_preparation

    if {"-h", "--help"} & {*arguments}:
        show_settings(PrepareConfig, cleandoc(prepare.__doc__ or ""), Console())
        return 0
    sources, words = split_words(arguments, ("--overwrite",))
    recipe, overrides = parse_settings(words)
    config = load_preparation(recipe or "none", overrides | ({"sources": tuple(sources)} if sources else {}))
    from moray.jobs.datasets.prepare import prepare as run

    run(config)
    return 0
