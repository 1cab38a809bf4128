"""What becomes of report.jsonl: report.json, report.html, and the comparison with an older report.

`model` reads and writes, `peers` compares contestants within a run, `gate` compares two runs, `plots` draws, `page`
makes the HTML, `markdown` the table for notes, `terminal` prints. Nothing here measures or needs root.
"""
