"""What ``flashvlm report`` measures and writes.

- ``records.py``   what ``report.json`` holds
- ``backends.py``  PyTorch, and a bundle in each backend, as functions of example and budget
- ``turns.py``     functions in processes of their own that take turns
- ``measure.py``   parity, latency, checks
- ``pages.py``     the report as HTML and Markdown, from the templates beside it
- ``write.py``     the whole of it
"""
