"""README states what the stored results say."""

from pathlib import Path

from benchmarks import report


def test_readme_has_the_table_of_the_stored_lines():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert report.table(report.RESULTS.read_text(encoding="utf-8")) in text
    assert report.readme(text) == text
