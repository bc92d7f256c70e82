"""What lies in a folder of checkpoints."""

from pathlib import Path


def names_in(folder: Path) -> list[str]:
    """Sorted; of a generation's own folder, what is staged in it."""
    names = []
    for path in folder.iterdir():
        if path.name.startswith(".generation-"):
            names += [f"staged/{each.name}" for each in path.iterdir() if each.name != "owner.json"]
        else:
            names.append(path.name)
    return sorted(names)
