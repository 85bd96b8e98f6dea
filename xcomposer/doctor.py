"""Say what is installed here, what is missing, and how to get it.

    xcomposer doctor

Exit code 1 where something is missing or too old that nothing works without.
"""

import argparse
import platform
from collections.abc import Sequence

from packaging.version import Version

from xcomposer.machine import ONEDNN, OPTIONAL, REQUIRED, amount, devices, installed_version, table

DECODERS = ("av", "torchcodec", "decord")


def check_required() -> tuple[list[tuple[str, str]], list[str]]:
    """Rows on what the package cannot do without, and what is to be done about them."""
    rows, remedies = [], []
    for package, (least, below) in REQUIRED.items():
        found = installed_version(package)
        wanted = ",".join(sign + bound for sign, bound in ((">=", least), ("<", below)) if bound)
        fits = found is not None and (
            (least is None or Version(found) >= Version(least)) and (below is None or Version(found) < Version(below))
        )
        rows.append((package, (found or "MISSING") + ("" if fits else f"  <- needs {package}{wanted}")))
        if not fits:
            remedies.append(f"pip install '{package}{wanted}'")
    return rows, remedies


def attention_kernels() -> str:
    """The implementations that `attn_implementation=` may name here."""
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    here = ["sdpa (the default)", "eager"]
    here += ["flex_attention"] * is_torch_flex_attn_available() + ["flash_attention_2"] * is_flash_attn_2_available()
    return ", ".join(here)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="example: xcomposer doctor", prog="xcomposer doctor"
    )
    parser.parse_args(argv)
    rows, remedies = check_required()
    print("InternLM-XComposer-2.5 on this machine\n")
    print(table([("python", platform.python_version()), ("system", platform.platform()), *rows]))
    if remedies:
        print("\nNothing works before this: " + "; ".join(remedies))
        return 1
    found = devices()
    rows = [(device.name, f"{device.title}, {amount(device.free)} of {amount(device.total)} free") for device in found]
    print("\nDevices\n" + table(rows))
    if found[0].name == "cpu":
        print("  No GPU that PyTorch can use: the 7B release answers slowly here, the demo checkpoint at once.")
        print(f"  A service of your own that imports the model: set {' and '.join(f'{name}=8' for name in ONEDNN)},")
        print("  or memory grows with each new length of a text. The commands of xcomposer do.")
    print("\nAttention\n  " + attention_kernels())
    present = [row for row in OPTIONAL if row.present()]
    absent = [row for row in OPTIONAL if not row.present()]
    if any(row.module in DECODERS for row in present):  # one is enough
        absent = [row for row in absent if row.module not in DECODERS]
    print("\nOptional, here\n" + (table([(row.module, row.serves) for row in present]) if present else "  none"))
    if absent:
        print("\nOptional, not here\n" + table([(row.module, f"{row.serves}: {row.install}") for row in absent]))
    return 0
