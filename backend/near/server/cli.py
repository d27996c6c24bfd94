"""`near serve` and `near keys`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from near import wire
from near.client import Client
from near.connection import find_connection, home_folder
from near.errors import NearError
from near.server.auth import KeyRing, is_loopback, parse_key, show_key, write_ticket
from near.server.config import Limits, ServeConfig, Times
from near.server.launch import serve

GIB = 1024 ** 3


def add_parser(subparsers) -> None:
    """Adds the commands; each sets `run`, a function of the parsed arguments that returns the exit code."""
    _add_serve(subparsers)
    _add_keys(subparsers)


add_parsers = add_parser

def _add_serve(subparsers) -> None:
    parser = subparsers.add_parser("serve", help="run the backend that Blender and other clients talk to",
                                   description="Runs until Ctrl-C, --stop, or the end of its parent. Loopback only unless --listen is given.")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--pack", default="compact", help="weights: compact, or an installed pack")
    parser.add_argument("--listen", default="", metavar="tcp://ADDRESS:PORT", help="listen there too, for clients with keys (near keys)")
    parser.add_argument("--allow-root", type=Path, action="append", default=[], metavar="FOLDER", help="clients may name files in it")
    parser.add_argument("--name", default="default", help="several backends of one user need names")
    parser.add_argument("--max-clients", type=int, default=Limits().clients)
    parser.add_argument("--memory-limit", type=float, default=0, metavar="GIB", help="replace a worker that uses more")
    parser.add_argument("--idle-minutes", type=float, default=Times().idle_stop / 60, help="then the models' memory is given back")
    parser.add_argument("--parent-pid", type=int, default=0, help="end with this process")
    parser.add_argument("--parent-pipe", action="store_true", help="end when standard input closes")
    parser.add_argument("--verbose", action="store_true", help="show the session log here too")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--stop", action="store_true", help="end the backend that runs")
    action.add_argument("--status", action="store_true", help="tell how the backend is")
    action.add_argument("--release", action="store_true", help="make the backend give its memory back")
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    if args.stop or args.status or args.release:
        return _speak(args)
    config = ServeConfig(
        name=args.name, device=args.device, pack=args.pack, listen=args.listen, allow_roots=tuple(args.allow_root),
        parent_pid=args.parent_pid, parent_pipe=args.parent_pipe, worker_memory=int(args.memory_limit * GIB),
        limits=dataclasses.replace(Limits(), clients=args.max_clients),
        times=dataclasses.replace(Times(), idle_stop=args.idle_minutes * 60))

    def say(connection) -> None:
        if args.json:
            print(json.dumps({"pid": connection.pid, "endpoints": connection.endpoints, "log": connection.log}), flush=True)
        else:
            print(f"NeAR backend {connection.version} (process {connection.pid}) is ready. Log: {connection.log}", flush=True)
            if config.listen:
                print(f"It also listens on {config.listen}, for clients with keys.", flush=True)

    found = serve(config, args.verbose, say)
    if found is not None:
        if args.json:
            print(json.dumps({"pid": found.pid, "endpoints": found.endpoints, "log": found.log, "running": True}))
        else:
            print(f"A NeAR backend runs already (process {found.pid}). Log: {found.log}")
    return 0


def _speak(args: argparse.Namespace) -> int:
    with Client.connect(find_connection(args.name), name="near serve") as client:
        if args.stop:
            client.call(wire.Shutdown(id=client.new_id()))
            if not args.json:
                print("The backend ends.")
        elif args.release:
            client.call(wire.Release(id=client.new_id()))
            if not args.json:
                print("The backend has given its memory back.")
        else:
            status = client.status()
            status.pop("log_lines", None)
            if args.json:
                print(json.dumps(status, indent=1))
            else:
                memory = status["memory"].get("resident_bytes", 0) / 1024 ** 2
                print(f"NeAR backend {status['version']} (process {status['pid']}), up {status['uptime_s']:.0f} s\n"
                      f"worker: {status['worker']} on {status['device']}, {memory:.0f} MB, started {status['starts']} times\n"
                      f"clients: {status['clients']}, waiting: {sum(status['queue'].values())}\nlog: {status['log']}")
    return 0


def _add_keys(subparsers) -> None:
    parser = subparsers.add_parser("keys", help="who may use this backend from other computers")
    commands = parser.add_subparsers(dest="keys_command", required=True)
    new = commands.add_parser("new", help="make keys for a client, allow them, and write the one file it needs")
    new.add_argument("name")
    new.add_argument("--address", required=True, metavar="tcp://HOST:PORT", help="where the client will reach this backend")
    new.add_argument("--out", type=Path, help="default: NAME.near-key.json here")
    new.set_defaults(run=_new)
    join = commands.add_parser("join", help="on the client: make keys of its own, which the backend's owner then allows")
    join.add_argument("backend_key", help="the backend's public key, from: near keys list")
    join.add_argument("--address", required=True, metavar="tcp://HOST:PORT", help="where the backend listens")
    join.add_argument("--out", type=Path, default=Path("backend.near-key.json"), help="default: %(default)s")
    join.set_defaults(run=_join)
    allow = commands.add_parser("allow", help="allow a client that made its own keys")
    allow.add_argument("name")
    allow.add_argument("public_key", help="64 hexadecimal digits, from: near keys join")
    allow.set_defaults(run=_allow)
    revoke = commands.add_parser("revoke", help="shut a client out")
    revoke.add_argument("name")
    revoke.set_defaults(run=_revoke)
    listing = commands.add_parser("list", help="who is allowed, and this backend's public key")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(run=_list)


def _ring() -> KeyRing:
    return KeyRing(home_folder())


def _new(args: argparse.Namespace) -> int:
    path = args.out or Path(f"{args.name}.near-key.json")
    _ring().ticket(args.name, args.address, path)
    print(f"{args.name} is allowed. Copy {path} to that computer over a safe way (it holds a secret key, mode 600),\n"
          f"start the backend with --listen, and connect with: --connect {path.name}")
    if is_loopback(args.address):
        print("Note: this address can only be reached from this computer.")
    return 0


def _join(args: argparse.Namespace) -> int:
    public = write_ticket(args.address, parse_key(args.backend_key), args.out)
    print(f"Ask the backend's owner to run:\n    near keys allow NAME {show_key(public)}\nthen connect with: --connect {args.out}")
    return 0


def _allow(args: argparse.Namespace) -> int:
    _ring().allow(args.name, args.public_key)
    print(f"{args.name} is allowed.")
    return 0


def _revoke(args: argparse.Namespace) -> int:
    _ring().revoke(args.name)
    print(f"{args.name} is shut out.")
    return 0


def _list(args: argparse.Namespace) -> int:
    ring = _ring()
    server, clients = show_key(ring.server().public), ring.clients()
    shown = {name: {**entry, "key": show_key(entry["key"])} for name, entry in sorted(clients.items())}
    if args.json:
        print(json.dumps({"server": server, "clients": shown}, indent=1))
        return 0
    print(f"this backend's public key: {server}")
    for name, entry in shown.items():
        print(f"{name:<20} {entry['key']}  since {entry['since']}")
    if not clients:
        print("Nobody is allowed. Allow a client with: near keys new NAME --address tcp://THIS-HOST:PORT")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The two commands alone, without the rest of the command line (and its imports)."""
    parser = argparse.ArgumentParser(prog="near")
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except NearError as error:
        print(f"{error.what}\n{error.remedy}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
