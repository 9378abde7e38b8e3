"""A stand-in for dmsetup over the nodes of `dmusernode`: the tables are a JSON file, the targets orders to the double.

    python tests/support/fakedmsetup.py STATE CONTROL ARGUMENTS...

where STATE is the file and CONTROL the double's socket. It knows `targets`, `info`, `create --notable`, `load`,
`clear`, `suspend`, `resume` and `remove` as dm-user needs them, checks the table line (DMU-161), and refuses what the
kernel does: a node name in use (DMU-162), and the removal of a device that is open, which a test says with `"open":
true` (DMU-174). Every call is noted under `calls`.
"""

import argparse
import fcntl
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TABLE = re.compile(r"0 ([0-9]+) user 0 ([0-9]+) ([A-Za-z0-9._-]+)")
_SECTOR_BYTES = 512


class Refused(Exception):
    """The command fails with these words."""


@contextmanager
def opened(path: str) -> Iterator[dict[str, Any]]:
    """The state under its lock; what was changed in it is kept, also after an error."""
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        state = json.loads(file.read() or '{"devices": {}, "calls": []}')
        try:
            yield state
        finally:
            file.seek(0)
            file.truncate()
            json.dump(state, file)


def order(control: str, line: str) -> None:
    """Have the double do something; `Refused` in the system's words."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(control)
        connection.sendall(f"{line}\n".encode())
        verdict, *numbers = connection.makefile("rb").readline().split()
    if verdict != b"ok":
        raise Refused(os.strerror(int(numbers[0])))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, as far as it is ours."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--table")
    parser.add_argument("--notable", action="store_true")
    parser.add_argument("--readonly", action="store_true")
    parser.add_argument("--noudevsync", action="store_true")
    parser.add_argument("--columns", action="store_true")
    parser.add_argument("--noheadings", action="store_true")
    parser.add_argument("-o")
    return parser.parse_args(arguments)


def create(devices: dict[str, Any], name: str) -> None:
    if name in devices:
        raise Refused("Device or resource busy")
    devices[name] = {"live": None, "inactive": None, "suspended": False, "open": False, "size": 0}


def load(devices: dict[str, Any], name: str, table: str, control: str) -> None:
    match = _TABLE.fullmatch(table)
    if match is None or match[1] != match[2]:
        raise Refused(f"Invalid table: {table!r}")
    node = match[3]
    if any(node in (device["live"], device["inactive"]) for device in devices.values()):
        raise Refused("Cannot allocate memory")
    device = devices[name]
    clear(device, control)
    size = int(match[1]) * _SECTOR_BYTES
    order(control, f"create {node} {size}")
    device["inactive"], device["size"] = node, size


def clear(device: dict[str, Any], control: str) -> None:
    if device["inactive"] is not None:
        order(control, f"remove {device['inactive']}")
        device["inactive"] = None


def drain(device: dict[str, Any], control: str) -> None:
    """Wait until the target has nothing under way: what is in flight is finished by its worker."""
    if device["live"] is not None:
        for what in ("queued", "unanswered"):
            order(control, f"await {device['live']} {what} 0")


def resume(device: dict[str, Any], control: str) -> None:
    old = device["live"]
    if device["inactive"] is not None:
        drain(device, control)
        device["live"], device["inactive"] = device["inactive"], None
        if old is not None:
            order(control, f"remove {old}")
    device["suspended"] = False


def remove(devices: dict[str, Any], name: str, control: str) -> None:
    device = devices[name]
    if device["open"]:
        raise Refused("Device or resource busy")
    clear(device, control)
    if device["live"] is not None:
        order(control, f"remove {device['live']}")
    del devices[name]


def info(device: dict[str, Any], column: str | None) -> None:
    filled = (device["live"] is not None, device["inactive"] is not None)
    tables = {(True, True): "Both", (True, False): "Live", (False, True): "Inactive", (False, False): "None"}[filled]
    print(tables if column == "tables_loaded" else f"Tables present: {tables}")


def main(path: str, control: str, arguments: list[str]) -> int:
    asked = parse(arguments)
    with opened(path) as state:
        state["calls"].append(" ".join(arguments))
        devices = state["devices"]
        try:
            if asked.command == "targets":
                print("linear           v1.4.0\nuser             v1.0.0")
                return 0
            if asked.command != "create" and asked.name not in devices:
                raise Refused("No such device or address")
            if asked.command == "create" and asked.notable:
                create(devices, asked.name)
            elif asked.command == "load":
                load(devices, asked.name, asked.table, control)
            elif asked.command == "clear":
                clear(devices[asked.name], control)
            elif asked.command == "suspend":
                devices[asked.name]["suspended"] = True
                drain(devices[asked.name], control)
            elif asked.command == "resume":
                resume(devices[asked.name], control)
            elif asked.command == "remove":
                remove(devices, asked.name, control)
            elif asked.command == "info":
                info(devices[asked.name], asked.o)
            else:
                raise Refused(f"Unknown command: {' '.join(arguments)}")
        except Refused as error:
            print(
                f"device-mapper: {asked.command} ioctl on {asked.name} failed: {error}\nCommand failed.",
                file=sys.stderr,
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
