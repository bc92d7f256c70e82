"""Settings as words of a command line."""

from collections.abc import Container

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


def split_words(arguments: list[str], switches: Container[str]) -> tuple[list[str], list[str]]:
    """The words of a command that belong to no setting, and those that do; a switch needs no value to be true."""
    words: list[str] = []
    settings: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
        elif word in switches:
            settings.append(f"{word}=true")
        else:
            settings += [word] if "=" in word or not rest else [word, rest.pop(0)]
    return words, settings


def check_utf8(name: str, value: str) -> None:
    """Raises UserError for bytes of a command line that are no text, as Python passes them on."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}={value!r} is not UTF-8") from None
