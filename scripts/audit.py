#!/usr/bin/env python3
"""Looks the pinned versions up in the database of known vulnerabilities, with pip-audit.

    python scripts/audit.py [constraints.txt]

Prints a line for each finding, and exits with 1 if there is any. Where the database cannot be reached, it
says so in one line, with the date of the last look at the advisories, and exits with 0: a machine without a
network is no finding.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: When the lower bounds in pyproject.toml were last compared with the published advisories.
LAST_LOOK = "2026-11-27"
#: Findings that do not apply, by their id, each with the reason.
NOT_APPLICABLE: dict[str, str] = {}
REQUEST_SECONDS, TOTAL_SECONDS = 5, 60
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def main(arguments: Sequence[str]) -> int:
    constraints = Path(arguments[0]) if arguments else CONSTRAINTS
    try:
        findings, audited = judge(look_up(constraints))
    except (ValueError, OSError, subprocess.TimeoutExpired):
        findings, audited = [], 0
    if not audited:
        print(f"not audited: no database of vulnerabilities can be reached; last looked at {LAST_LOOK}")
        return 0
    for line in findings:
        print(line)
    print(f"audited {audited} pinned versions; known vulnerabilities: {len(findings)}")
    return 1 if findings else 0


def look_up(constraints: Path) -> Any:
    """pip-audit's report as JSON; raises ValueError, OSError or TimeoutExpired if it wrote none."""
    command = [
        sys.executable, "-m", "pip_audit", "--requirement", str(constraints), "--no-deps", "--disable-pip",
        "--format", "json", "--progress-spinner", "off", "--timeout", str(REQUEST_SECONDS),
    ]  # fmt: skip
    completed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TOTAL_SECONDS)
    return json.loads(completed.stdout)


def judge(report: Any) -> tuple[list[str], int]:
    """The findings that apply, a line each, and how many versions the database knew."""
    packages = [package for package in report["dependencies"] if "vulns" in package]  # else it was skipped
    findings = []
    for package in packages:
        for finding in package["vulns"]:
            if not NOT_APPLICABLE.keys() & {finding["id"], *finding.get("aliases", ())}:
                fixed = ", ".join(finding["fix_versions"]) or "no version"
                findings.append(f"{package['name']} {package['version']}: {finding['id']}, fixed in {fixed}")
    return findings, len(packages)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
