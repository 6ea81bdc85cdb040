"""Makes `minilm.npz`: what sentence-transformers computes for the demo model, in fp32.

Run once in an environment of its own, next to the demo model's files:
    pip install torch==2.13.0 sentence-transformers==5.7.0
    python tests/goldens/make_minilm.py DIRECTORY_OF_THE_MODEL
`tests/test_parity.py` compares the server's vectors with the result.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

TEXTS = [
    "",
    "a",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "   ",
    "\n\t \r\n",
    " leading and trailing space ",
    "\U0001f600",
    "I \u2764\ufe0f embeddings \U0001f680\U0001f680\U0001f680",
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u5427\u3002",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "Caf\u00e9 na\u00efve \u00c5ngstr\u00f6m \u00fcber \u00c6sir",
    "e\u0301 combining accents a\u0308o\u0308u\u0308",
    "def plan(pending, slot):\n    return min(pending, key=lambda e: e.age)",
    "https://example.org/path?query=1&other=two#fragment",
    "3.14159265358979 2,718 1e-10 0xDEADBEEF",
    "[CLS] special [SEP] tokens [MASK] in [PAD] text [UNK]",
    "NUL\x00 and control\x07 characters\x1b[0m",
    "x" * 99,
    "x" * 5000,
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "word " * 253,
    "word " * 254,
    "word " * 255,
    "Sentence number one is short. " * 40,
    " ".join(f"word{number}" for number in range(5000)),
    "\u6f22" * 400,
    "\u200bzero\u200bwidth\u200c joiners\u200d",
]


def main() -> None:
    """Encode `TEXTS` and store them with their vectors."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, "model")
        shutil.copytree(sys.argv[1], directory)
        model = SentenceTransformer(str(directory), device="cpu")
        # Texts alone: no vector depends on its neighbours' padding.
        rows = np.stack([model.encode(text, convert_to_numpy=True) for text in TEXTS])
    print(model, rows.shape, rows.dtype, model.max_seq_length)
    np.savez_compressed(Path(__file__).with_name("minilm.npz"), texts=np.array(TEXTS), rows=rows)


if __name__ == "__main__":
    main()
