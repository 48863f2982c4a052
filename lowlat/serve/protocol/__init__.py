"""Chat requests, their parts and their validation (pydantic); shared by all APIs."""
