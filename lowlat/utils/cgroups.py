"""Control groups (cgroup v1 and v2) of this process, as folders of limit files."""

from pathlib import Path


def group_folders(controller: str, root: Path = Path("/"), process: str = "self") -> list[Path]:
    """Folders of the groups whose limits apply to a process, by default this one: its own and all
    above, in cgroup v2 and, for `controller`, in cgroup v1. If none is known, the topmost one (a
    container's own). `root` is the folder of proc and sys.
    """
    top = root / "sys/fs/cgroup"
    folders = [top, top / controller]
    try:
        lines = (root / "proc" / process / "cgroup").read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers != "" and controller not in controllers.split(","):
            continue
        mount = top if controllers == "" else top / controller
        own = mount / group.lstrip("/")
        folders += [own, *(above for above in own.parents if above.is_relative_to(mount))]
    return list(dict.fromkeys(folders))
