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
        if name == "recipe":
            recipe = value
        else:
            overrides[name] = value
    return recipe, overrides
