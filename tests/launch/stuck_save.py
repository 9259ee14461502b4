"""`examples/multi_digits.py`, whose second save stops for ever with the weighter's file half written."""

import os
import runpy
import sys
import time
from pathlib import Path

from accelerate import Accelerator

SCRIPT = Path(__file__).parents[2] / "examples" / "multi_digits.py"


def main() -> None:
    save, saves = Accelerator.save_state, 0

    def stuck(self: Accelerator, folder: str) -> None:
        nonlocal saves
        saves += 1
        save(self, folder)
        if saves == 2:
            if self.is_main_process:
                file = Path(folder) / "custom_checkpoint_0.pkl"
                os.truncate(file, file.stat().st_size // 2)
                print("half written", flush=True)
            time.sleep(600)

    Accelerator.save_state = stuck
    sys.path[0] = str(SCRIPT.parent)
    sys.argv[0] = str(SCRIPT)
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main()
