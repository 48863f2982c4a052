"""HTTP routes: one module per API, with its request and response models, its Reply and its Post.

To add an API, convert its request to a ChatRequest (`validate`), submit it (`chat.submit_chat`),
build its response and events in a Reply, and list its Post in `operations`.
"""
