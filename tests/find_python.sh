#!/usr/bin/env bash
# Prints the path of a Python of VERSION that can make virtual environments, or nothing. usage: tests/find_python.sh VERSION
for candidate in "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
  if "$candidate" -c 'import venv' 2>/dev/null; then
    command -v "$candidate"
    break
  fi
done
