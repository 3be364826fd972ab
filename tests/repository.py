"""A git repository that a test makes and changes."""

import subprocess


def write(folder, files):
    """Files of these names and texts."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def repository(folder, files):
    """A repository with one commit; returns what runs git in it and gives back what it prints."""

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    write(folder, files)
    git("init", "-q")
    committed(git)
    return git


def committed(git):
    """Commit all that is there; returns the commit."""
    git("add", "-A")
    git("commit", "-qm", "a")
    return git("rev-parse", "HEAD")
