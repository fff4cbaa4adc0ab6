"""Measure status and latency of one URL per job.

What a job finds is printed, into its agent's output, and noted in the Redis hash example:{run_id}.
"""

import json
import os
import time
import urllib.error
import urllib.request

import humanize
import redis

results = redis.Redis(os.environ["REDIS_HOST_VAR_ENV"], int(os.environ["REDIS_PORT_VAR_ENV"]))


@app.task(name="tasks.consume_message", acks_late=True)
def consume_message(job):
    request = urllib.request.Request(
        job["url"], headers=agent_message["headers"], method=job["request"]["method"]
    )
    begun = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=job["request"]["timeout_seconds"]) as reply:
            body, status = reply.read(), reply.status
    except urllib.error.HTTPError as error:
        body, status = error.read(), error.code
    except OSError as error:
        body, status = b"", str(error)
    result = {
        "job": job["targetted_job"],
        "name": job["name"],
        "agent": agent_message["targetted_agent"],
        "user_agent": agent_message["headers"]["User-Agent"],
        "status": status,
        "milliseconds": round(1000 * (time.perf_counter() - begun), 1),
        "size": humanize.naturalsize(len(body)),
    }
    print(json.dumps(result))
    key = f"example:{job['run_id']}"
    results.hset(key, job["targetted_job"], json.dumps(result))
    results.expire(key, 24 * 3600)
