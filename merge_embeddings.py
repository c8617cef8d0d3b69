"""Puts several learned words into one folder, turns concepts of ELITE into learned words, and
writes what other programs read.

    python merge_embeddings.py --embeddings runs/cat runs/mug --output_dir runs/both
    python merge_embeddings.py --embeddings runs/cat1 runs/cat2 --output_dir runs/both \\
        --rename "<cat>=<cat2>"
    python merge_embeddings.py --embeddings corgi.safetensors --output_dir runs/corgi
    python merge_embeddings.py --embeddings runs/cat --output_dir embeddings --format a1111 \\
        --rename "<cat>=mycat"

Of placeholders that clash the first keeps its name; each --rename OLD=NEW names the next one. A
concept gives its primary word w0, named after its file; without ELITE's own K and V, which no such
file can hold, a stock pipeline draws it only roughly.
"""

from elite.config import parse_config
from elite.console import OK, quiet_libraries, run
from elite.settings import MergeEmbeddingsConfig


def main() -> int:
    config = parse_config(MergeEmbeddingsConfig)
    quiet_libraries()
    from pathlib import Path

    from textual_inversion.files import (
        EMBEDDING_FILES,
        either,
        files_of,
        merge_embeddings,
        save_embeddings,
    )

    renames = [(old, new) for old, _, new in (text.rpartition("=") for text in config.rename)]
    merged = merge_embeddings(config.embeddings, renames)
    files, folder = files_of(merged, config.format), Path(config.output_dir)
    for name, content in files.items():
        save_embeddings(folder / name, content)
    if config.format == "diffusers":  # what is read as a whole
        for name in set(EMBEDDING_FILES.values()) - files.keys():
            for path in either(folder / name):
                path.unlink(missing_ok=True)
    for encoder, embeddings in merged.items():
        words = ", ".join(f"{name} ({len(rows)})" for name, rows in embeddings.items())
        print(f"{encoder}: {words}")
    return OK


if __name__ == "__main__":
    run(main)
