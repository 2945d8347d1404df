"""Which version of the source code is running."""

import subprocess
from pathlib import Path


def git_revision() -> str | None:
    """The commit of the checkout that headscope is imported from, "+changes" where files differ from it; None where
    it isn't in one."""
    folder = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # an installed package may lie inside somebody else's repository
        if not git("ls-files", "--", "__init__.py"):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
