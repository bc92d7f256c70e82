"""Settings as words of a command line."""

from moray import UserError


def parse_settings(arguments: list[str]) -> tuple[str | None, dict[str, str]]:
    """`--recipe R --section.key value --section.key=value` -> (R, {"section.key": "value"}); dashes are underscores."""
    recipe, overrides = None, {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"{flag} was not expected; settings are written --section.key value")
        name, equals, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} needs a value")
            value = rest.pop(0)
        check_utf8(name, value)
        if name == "recipe":
            recipe = value
        else:
            overrides[name] = value
    return recipe, overrides


def split_settings(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Settings (`--section.key value`) out of the words of a command that has options, too: the words, the settings."""
    words: list[str] = []
    settings: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and "." in word.partition("=")[0]:
            settings += [word] if "=" in word or not rest else [word, rest.pop(0)]
        else:
            words.append(word)
    return words, parse_settings(settings)[1]


def check_utf8(name: str, value: str) -> None:
    """Raises UserError for bytes of a command line that are no text, as Python passes them on."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}={value!r} is not UTF-8") from None
