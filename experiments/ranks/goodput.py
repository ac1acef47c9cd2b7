"""What one TCP connection carries each way while both ways are busy, as in a sum of gradients.

    goodput.py serve ADDRESS          on one host
    goodput.py ask ADDRESS MEGABYTES  on the other: prints bytes per second
"""

import socket
import sys
import threading
import time

PORT = 5019


def swap(connection, count):
    """Sends and receives so many bytes at once."""
    sender = threading.Thread(target=connection.sendall, args=(bytes(count),))
    sender.start()
    while count > 0:
        count -= len(connection.recv(1 << 18))
    sender.join()


what, address, *rest = sys.argv[1:]
if what == "serve":
    with socket.create_server((address, PORT)) as server:
        connection, _ = server.accept()
        swap(connection, int.from_bytes(connection.recv(8), "little"))
        connection.recv(1)
else:
    count = int(float(rest[0]) * 1e6)
    for attempt in range(50):
        try:
            connection = socket.create_connection((address, PORT))
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    connection.sendall(count.to_bytes(8, "little"))
    begun = time.monotonic()
    swap(connection, count)
    print(count / (time.monotonic() - begun))
