"""The DNS servers of the attachments: names are judged, answers open addresses in the kernel, denials say why.

`server` is the interface for the daemon. A query goes `server` or `tcp` → `handler` (order of work) → `wire` (form),
`judge` (policy) or `proxy` (control plane), `cache`, `upstream` over `exchange` (sockets), `answer` (what came back),
`guard` (rebinding), `cut` (what it takes out), `message` (the reply). Change how a message looks in `message`, what is
allowed in `judge` and `guard`, whom we ask in `upstream`, every bound in `limits`.
"""
