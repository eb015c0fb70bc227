"""The same rows in every kind of file."""

import csv
import gzip
import io
import json

RECORD = "性别: 男\n年龄: 48\n主诉: 咳嗽3天\n现病史: 无发热。"


def made(count=12):
    return [
        {"id": f"n{number}", "feature_content": f'{RECORD}\n既往史: "{number}"; a, b\t{{[例{number}\\'}
        for number in range(count)
    ]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def delimited(rows, **dialect):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def zstd(content):
    import zstandard

    return zstandard.ZstdCompressor().compress(content)


def parquet(rows):
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink, row_group_size=5)
    return sink.getvalue().to_pybytes()


def xlsx(rows, *more):
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    for sheet in more:
        book.create_sheet(sheet).append(["note"])
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def text(rows, encoding="utf-8"):
    return json.dumps(rows, ensure_ascii=False).encode(encoding)


KINDS = {
    "plain.jsonl": jsonl,
    "mark.jsonl": lambda rows: b"\xef\xbb\xbf" + jsonl(rows),
    "windows.jsonl": lambda rows: jsonl(rows).replace(b"}\n", b"}\r\n"),
    "mac.jsonl": lambda rows: jsonl(rows).replace(b"}\n", b"}\r"),
    "no_end.jsonl": lambda rows: jsonl(rows).rstrip(),
    "no_suffix": jsonl,
    "gb.jsonl": lambda rows: jsonl(rows).decode().encode("gb18030"),
    "utf16.jsonl": lambda rows: jsonl(rows).decode().encode("utf-16"),
    "utf16be.jsonl": lambda rows: b"\xfe\xff" + jsonl(rows).decode().encode("utf-16-be"),
    "wrong_name.csv": jsonl,
    "packed.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "packed_unnamed": lambda rows: gzip.compress(jsonl(rows)),
    "two_parts.jsonl.gz": lambda rows: gzip.compress(jsonl(rows[:5])) + gzip.compress(jsonl(rows[5:])) + b"\0\0",
    "packed.jsonl.zst": lambda rows: zstd(jsonl(rows)),
    "two_parts.jsonl.zst": lambda rows: zstd(jsonl(rows[:5])) + zstd(jsonl(rows[5:])),
    "array.json": text,
    "array.jsonl": text,
    "gb.json": lambda rows: text(rows, "gb18030"),
    "lines.json": lambda rows: b"[\n" + b",\n".join(jsonl(rows).splitlines()) + b"\n]\n",
    "pretty.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=2).encode(),
    "ascii.json": lambda rows: json.dumps(rows, indent="\t").encode(),
    "wrapped.json": lambda rows: text({"version": 1, "data": rows, "info": {"by": "x"}, "count": 3}),
    "wrapped_pretty.json": lambda rows: json.dumps({"n": 1.5, "rows": rows, "of": [1]}, indent=1).encode(),
    "objects.json": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    "table.csv": lambda rows: delimited(rows).encode(),
    "mark.csv": lambda rows: delimited(rows).encode("utf-8-sig"),
    "all_quoted.csv": lambda rows: delimited(rows, quoting=csv.QUOTE_ALL, lineterminator="\n").encode(),
    "mac.csv": lambda rows: delimited(rows, lineterminator="\r").encode(),
    "gb.csv": lambda rows: delimited(rows).encode("gb18030"),
    "excel.txt": lambda rows: delimited(rows, delimiter="\t").encode("utf-16"),
    "semicolons.csv": lambda rows: delimited(rows, delimiter=";").encode(),
    "table.tsv": lambda rows: delimited(rows, delimiter="\t").encode(),
    "table.csv.gz": lambda rows: gzip.compress(delimited(rows).encode()),
    "table.parquet": parquet,
    "table_unnamed": parquet,
    "table.xlsx": xlsx,
}
