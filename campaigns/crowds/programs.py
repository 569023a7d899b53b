from pathlib import Path

from campaigns.campaign import Campaign, Case


def run(campaign: Campaign, case: Case, folder: Path) -> None: ...
