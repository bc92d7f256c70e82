"""The table of presets in docs/models.md: parameters of each, and how long its decoder takes to build without memory.

python benchmarks/presets_table.py [--into docs/models.md]
"""

import argparse
import time
from pathlib import Path

import torch
from parity_table import replaced

from moray.model import Decoder, ModelConfig
from moray.model.accounting.cost import count_parameters
from moray.model.presets import PRESETS


def row(name: str) -> str:
    config = ModelConfig.preset(name)
    began = time.perf_counter()
    with torch.device("meta"):
        Decoder(config)
    seconds = time.perf_counter() - began
    total, active = count_parameters(config)
    return f"| {name} | {total:,} | {active:,} | {seconds:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    head = ["| preset | parameters | of which a token passes | seconds to build |", "|---|---|---|---|"]
    made = "\n".join([*head, *map(row, PRESETS)])
    if options.into:
        options.into.write_text(replaced(options.into.read_text(), "preset table", made))
    else:
        print(made)


if __name__ == "__main__":
    main()
