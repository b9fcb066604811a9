from pathlib import Path


def report(path: Path) -> Path:
    return path / "results.csv"
