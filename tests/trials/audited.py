"""The command line under an audit hook: ``python -m tests.trials.audited LOG ARGUMENTS``.

The hook is there before anything of the package is imported. Each event that matters is a line of
JSON in LOG: the event, what it was about, and the innermost frames of Python, the latest first.
"""

import json
import os
import sys

LISTED = (
    "socket.connect",
    "socket.bind",
    "socket.sendto",
    "socket.getaddrinfo",
    "pickle.find_class",
)
STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
)
CHANGES = {
    "os.mkdir": 0,
    "os.rename": 1,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.link": 1,
    "os.symlink": 1,
    "os.truncate": 0,
    "os.chmod": 0,
    "os.chown": 0,
    "os.utime": 0,
    "shutil.rmtree": 0,
}
"""Events that change a place, and which argument names it."""
NEW = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FRAMES = 12


def main():
    """Put the hook there, and run the command."""
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event, arguments):
        about = subject(event, arguments)
        if about is not None:
            line = json.dumps({"event": event, "about": about, "frames": frames()})
            os.write(log, line.encode() + b"\n")

    sys.addaudithook(hook)
    from balora_jax.cli import main as command

    sys.exit(command(sys.argv[2:]))


def subject(event, arguments):
    """What an event is about, as text; None where it does not matter."""
    if event in LISTED or event in STARTS:
        return repr(arguments)[:500]
    if event == "open":
        path, mode, flags = arguments
        changes = (flags or 0) & NEW or set(str(mode or "")) & set("wax+")
        return place(path) if changes else None
    return place(arguments[CHANGES[event]], arguments) if event in CHANGES else None


def place(path, arguments=()):
    """An absolute path; None for what is open already."""
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    path = os.fsdecode(path)
    # What removes a tree names a file by its folder's descriptor.
    folder = arguments[-1] if arguments else -1
    if isinstance(folder, int) and folder > 2 and not os.path.isabs(path):
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.realpath(path)


def frames():
    """Where it happened: file and function, the latest first."""
    found, frame = [], sys._getframe(2)
    while frame is not None and len(found) < FRAMES:
        found.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return found


if __name__ == "__main__":
    main()
