"""Documents pushed through Redis by any program, without a dataset or a model at hand.

    async with Producer("redis://localhost:6379/0", inbox="wiki") as producer:
        await producer.add("a", "some text", metadata={"lang": "en"})
        await producer.delete("b")
    print(producer.receipts.admitted)

A batch is kept in memory until its receipt says that the dataset has it. When no receipt comes and the inbox does not have
it either, as after Redis lost its data, it is pushed again under its key; the dataset knows the key: nothing is doubled.
"""

from .producer import Producer
from .receipts import ReceiptTotals

__all__ = ["Producer", "ReceiptTotals"]
