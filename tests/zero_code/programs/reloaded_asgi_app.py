"""An application for uvicorn, which starts it in processes of its own: `--reload`, `--workers`."""

import os

from fastapi import FastAPI

app = FastAPI()
print("application made in", os.getpid(), flush=True)


@app.get("/pid")
async def pid():
    return {"pid": os.getpid()}
