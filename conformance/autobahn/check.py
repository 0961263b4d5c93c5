"""Runs Autobahn's cases against an echo server and counts; usage: check.py ws://HOST:PORT"""

import asyncio
import collections
import sys
from urllib.parse import urlsplit

from kosoku import FailureError, run_fuzzingclient

# Left out: 9.* measure speed with messages of up to 16 MiB, 12.* and 13.* are permessage-deflate, which is not offered.
LEFT_OUT = ["9.*", "12.*", "13.*"]


async def main(address):
    try:
        results = await run_fuzzingclient(urlsplit(address).netloc, None, LEFT_OUT, concurrency=4)
    except FailureError as e:
        results = e.results
    count = collections.Counter(r.behavior.value for r in results)
    failed = [r for r in results if not r.passed]
    for r in failed:
        print(f"FAIL  {r.case_id}: {r.result}; {r.result_close}")
    print(f"{len(results)} cases: {dict(count)}, {len(failed)} failed")
    return 1 if failed or len(results) < 240 else 0


sys.exit(asyncio.run(main(sys.argv[1])))
