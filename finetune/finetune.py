"""Fine-tune the model, under the name that users of the original know: `xcomposer finetune` is the same.

python finetune/finetune.py --model FOLDER --data train.json --output_dir OUT --mode lora --bf16
"""

import sys

from xcomposer.finetune.run import main

if __name__ == "__main__":
    sys.exit(main())
