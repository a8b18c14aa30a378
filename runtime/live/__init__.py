"""A camera, or a video in its place, and a standing question: the newest frame is asked about, the others are dropped.

- ``frame.py``      a frame, and what every source of frames is
- ``sources.py``    what ``--source`` says → a source
- ``files.py``      a video file at its own pace, a still picture again and again
- ``streams.py``    cameras and network streams, through FFmpeg
- ``gstreamer.py``  any GStreamer pipeline, in a process of its own; the Jetson's CSI cameras
- ``newest.py``     a place for one value, the newest, that any number of readers wait on
- ``receiver.py``   a thread: source → newest frame; connects again when a source breaks off
- ``watch.py``      the loop: newest frame → answer, and what is counted
- ``drawing.py``    kept visual tokens, answer and statistics → a picture
- ``outputs.py``    pictures → a video file, or the newest one in a picture file
"""
