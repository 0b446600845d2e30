"""Tells a running job what to aim at, through its unix socket; needs nothing of the plugin.

python client.py perseus_out '{"power_budget_w": "180kW", "for_s": 600, "source": "site"}'
"""

import json
import socket
import sys
import time


def ask(folder: str, request: dict) -> dict:
    """Send one JSON line, read one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(f"{folder}/stragglers.sock")  # at most 107 bytes: change into a folder with a long path
        connection.sendall(json.dumps(request).encode() + b"\n")
        reply = json.loads(connection.makefile().readline())
    if not reply["ok"]:
        sys.exit(reply["error"])
    return reply


if __name__ == "__main__":
    number = ask(sys.argv[1], {"do": "target", "target": json.loads(sys.argv[2])})["number"]
    while True:
        outcomes = ask(sys.argv[1], {"do": "targets"})["outcomes"]
        mine = [outcome for outcome in outcomes if outcome["number"] == number]
        if mine and mine[0]["state"] != "waiting":
            break
        time.sleep(0.2)
    print(mine[0]["state"], mine[0]["iteration"], mine[0]["reason"])
