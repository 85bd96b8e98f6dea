"""Chat about pictures and videos, under the name that users of the original know: `xcomposer chat` is the same.

python examples/example_chat.py --model FOLDER --image a.jpg --text "What is it?" --num_gpus 2
"""

import sys

from xcomposer.chat import main

if __name__ == "__main__":
    sys.exit(main())
