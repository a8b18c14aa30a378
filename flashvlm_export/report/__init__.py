"""What ``flashvlm report`` measures and writes.

- ``records.py``   what ``report.json`` holds
- ``backends.py``  PyTorch, and a bundle in each backend, as functions of example and budget
- ``worker.py``    a function in a process of its own
- ``measure.py``   what runs, in which order
- ``figures.py``   parity, latency, checks
- ``environment.py`` where it was measured
- ``pages.py``     the report as HTML and Markdown, from the templates beside it
- ``write.py``     the whole of it
"""
