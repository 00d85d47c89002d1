"""A process that prints its id and sleeps, fails or ends by a signal, as its request on standard input says."""

import json
import os
import sys
import time

if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    print(json.dumps({"pid": os.getpid()}), flush=True)
    if "signal" in request:
        os.kill(os.getpid(), request["signal"])
    time.sleep(request["seconds"])
