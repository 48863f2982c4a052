"""The control groups this process runs in, as folders; what their files say is the readers'."""

from pathlib import Path


def group_folders(controller: str, root: Path = Path("/")) -> list[Path]:
    """Folders of the groups whose limits hold for this process: its own and all above it, in cgroup
    2 and among those of `controller` in cgroup 1; where none is known, the topmost one, which in a
    container is the container's. `root` is where proc and sys lie.
    """
    top = root / "sys/fs/cgroup"
    folders = [top, top / controller]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
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
