"""x"""
from .fields import field_cases
from server.conftest import Server, serving
from .wire import exchange
def test_x():
    cases=list(field_cases())
    print(len(cases))
    with serving("--context","96") as server:
        import time; t=time.time(); bad=0
        for c in cases:
            r=exchange(server.port,c.make())
            try: ok = r.status==c.status and r.error["param"]==c.param and c.words in r.error["message"]
            except Exception as e: ok=False
            if not ok:
                bad+=1; print("BAD",c, r.status, r.body[:300])
        print(bad, time.time()-t)
    assert 0
