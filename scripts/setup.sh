# Sourced by demo.sh and test.sh: a virtual environment in .venv with r2 and the extras named in $1, at the tested versions.
python=$(command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3.10 || command -v python3)
[ -x .venv/bin/python ] || { rm -f .venv/.r2-*; "$python" -m venv .venv; }
if [ ! -e ".venv/.r2-$1" ] || [ pyproject.toml -nt ".venv/.r2-$1" ] || [ constraints.txt -nt ".venv/.r2-$1" ]; then
  .venv/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".$1"
  touch ".venv/.r2-$1"
fi
