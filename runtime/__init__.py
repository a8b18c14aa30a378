"""What ships to the device; never imports torch or transformers.

- ``pipeline.py``    images and questions in, answers out
- ``images.py``      reading an image safely
- ``preprocess.py``  image → ``pixel_values``, bit for bit as the checkpoint's processor
- ``prompt.py``      chat template, tokens, streaming text
- ``embeddings.py``  embedding table, padding, splicing
- ``graph_inputs.py`` photographs and questions as inputs of the graph, for calibration
- ``sessions/``      backends of the visual graph
- ``live/``          a camera or a video and a standing question
- ``llm/``           language-model engines
- ``image_cache.py`` encoded images by content, in bounded memory
- ``prompt_file.py`` a pruned prompt as a file for any engine
- ``heatmap.py``     pictures of what was kept
"""
