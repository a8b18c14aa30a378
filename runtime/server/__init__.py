"""The server: OpenAI's chat completions over HTTP, from any number of clients, answered by one service.

- ``settings.py``      one configuration: what runs, how it batches, what a request may be, who may ask
- ``schema.py``        the body of a request
- ``pictures.py``      ``image_url`` → bytes of a picture that is safe to decode
- ``conversation.py``  messages → what a pipeline is asked
- ``reading.py``       threads for both
- ``answering.py``     what is asked → what is kept, pieces of text, and the answer
- ``replies.py``       that → OpenAI's objects and events
- ``api_errors.py``    whatever goes wrong → OpenAI's error object
- ``guard.py``         keys, hosts, sizes and time of every request
- ``metrics.py``       Prometheus
- ``app.py``           the routes
- ``live.py``          the newest annotated frame of ``flashvlm live``, for viewers
- ``listening.py``     the socket, until a signal
- ``ray_app.py``       the same on many machines, a Ray Serve application
- ``page/``            the page at ``/``
"""
