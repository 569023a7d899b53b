"""The command ``python -m campaigns.remote``."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from campaigns import remote
from campaigns.campaign import SKIPPED, Campaign, parser, run
from campaigns.remote.cases import CASES, Bench, run_case
from campaigns.remote.faults import FAULTS
from campaigns.remote.proxy import Proxy
from campaigns.remote.servers import MissingServer, Store, seaweedfs
from campaigns.remote.writers import Crew

DEFAULT_CASES = 32


def main(arguments: Sequence[str] | None = None, *, store: Store | None = None) -> int:
    """Run the campaign, on a store that runs already or on one of its own."""
    options = parser(remote.__doc__, writes=True, faults=FAULTS)
    options.add_argument("--only", choices=CASES, help="only these cases (default: all)")
    return run(
        "remote", options, lambda campaign: _body(campaign, store), cases=DEFAULT_CASES, arguments=arguments
    )


def _body(campaign: Campaign, store: Store | None) -> None:
    folder = Path(tempfile.mkdtemp(prefix="remote-", dir=campaign.options.directory)).resolve()
    with contextlib.ExitStack() as stack:
        if store is None:
            try:
                store = stack.enter_context(seaweedfs())
            except MissingServer as error:
                campaign.count(f"{SKIPPED}: {error}")
                return
        store.set_environment()
        proxy = stack.enter_context(Proxy(store.port, seed=campaign.options.seed))
        crew = stack.enter_context(Crew())
        bench = Bench(campaign, store, proxy, crew, folder)
        try:
            for case in campaign.cases():
                run_case(bench, case, campaign.options.only)
        finally:
            for name, number in sorted(proxy.counts.items()):
                campaign.count(f"requests: {name}", number)
            campaign.count("faulty uploads", proxy.faulty_uploads)
    shutil.rmtree(folder, ignore_errors=True)  # not after a counterexample: its folder is evidence


if __name__ == "__main__":
    sys.exit(main())
