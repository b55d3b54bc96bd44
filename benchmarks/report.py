"""`python -m benchmarks.report`: writes README's speed table from the stored lines."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-epyc-zen4-2threads.jsonl"
JOBS = {
    "select_topk": "Select the 1 % most changed of 100M parameters",
    "masked_adamw": "One AdamW step of 2.8 % of XLM-R base",
    "compose": "Put a 2.8 % fine-tuning on XLM-R base, with undo",
    "restore": "Take it off again, exact to the bit",
}


def table(lines: str) -> str:
    """The table of stored results, as Markdown."""
    rows = [
        "| job (fp32) | sparse_ft | compared with | | ratio |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for record in map(json.loads, lines.splitlines()):
        seconds = {name: m["median"] for name, m in record["providers"].items()}
        mine = next(name for name in seconds if name.startswith("sparse_ft"))
        ours = seconds.pop(mine)
        job, time = JOBS[record["case"]], f"{ours * 1e3:.0f} ms"
        for peer in sorted(seconds, key=seconds.__getitem__):
            ratio = seconds[peer] / ours
            rows.append(
                f"| {job} | {time} | {peer} | {seconds[peer] * 1e3:,.0f} ms | {ratio:.1f}× |"
            )
            job = time = ""
    return "\n".join(rows)


def readme(text: str) -> str:
    """README with the table of the stored lines in it."""
    body = table(RESULTS.read_text(encoding="utf-8"))
    return re.sub(r"\| job \(fp32\).*?\n\n", lambda _: body + "\n\n", text, count=1, flags=re.S)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8")), encoding="utf-8")
