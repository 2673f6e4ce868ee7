"""``python -m tests.fuzz --inputs 100000``: runs the fuzzer for as long as you like and prints what it found."""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from pathlib import Path

from tests.fuzz.campaign import campaign
from tests.fuzz.targets import TARGETS, Bed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--only", choices=TARGETS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = options.only or list(TARGETS)
    begun = time.monotonic()
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as folder:
        bed = Bed(Path(folder))
        for name in names:
            count, start = bed.count, time.monotonic()
            try:
                campaign(bed, name, options.inputs // len(names), options.seed)
                result = "only embedsurgery's own errors"
            except Exception as error:
                result = f"FAILED: {type(error).__name__}: {error}"[:400]
                lines = [line[:300] for line in traceback.format_exception(error)]
                print("".join(lines[-6:]), *(note[:1000] for note in getattr(error, "__notes__", ())), flush=True)
            print(
                f"{name}: {bed.count - count:,} inputs in {time.monotonic() - start:.0f} s, "
                f"{time.process_time():.0f} s of processor time so far: {result}",
                flush=True,
            )
        print(f"{bed.count:,} inputs in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
