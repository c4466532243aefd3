"""The least that is an Excel workbook: text, numbers, and dates by their style."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence

PACKAGE = "http://schemas.openxmlformats.org/package/2006"
DOCUMENT = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
SHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"


def workbook(rows: Iterable[Sequence[str | float | None]], date_column: int) -> bytes:
    """A workbook of one sheet; numbers of `date_column` are days since 1899-12-30."""

    def cell(value: str | float | None, column: int) -> str:
        if value is None:
            return "<c/>"
        if isinstance(value, str):
            return f'<c t="inlineStr"><is><t>{value}</t></is></c>'
        return f'<c s="{int(column == date_column)}"><v>{value}</v></c>'

    def relations(**targets: str) -> str:
        lines = (f'<Relationship Id="{kind}" Type="{DOCUMENT}/{kind}" Target="{path}"/>' for kind, path in targets.items())
        return f'<Relationships xmlns="{PACKAGE}/relationships">{"".join(lines)}</Relationships>'

    lines = "".join(f"<row>{''.join(cell(value, column) for column, value in enumerate(row))}</row>" for row in rows)
    sheets = '<sheets><sheet name="Online Retail" sheetId="1" r:id="worksheet"/></sheets>'
    kinds = '<Default Extension="xml" ContentType="application/xml"/>'
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types">{kinds}</Types>',
        "_rels/.rels": relations(officeDocument="xl/workbook.xml"),
        "xl/workbook.xml": f'<workbook xmlns="{SHEET}" xmlns:r="{DOCUMENT}">{sheets}</workbook>',
        "xl/_rels/workbook.xml.rels": relations(worksheet="worksheets/sheet1.xml", styles="styles.xml"),
        "xl/styles.xml": f'<styleSheet xmlns="{SHEET}"><cellXfs><xf numFmtId="0"/><xf numFmtId="22"/></cellXfs></styleSheet>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{SHEET}"><sheetData>{lines}</sheetData></worksheet>',
    }
    return zipped({name: part.encode() for name, part in parts.items()})


def zipped(files: Mapping[str, bytes]) -> bytes:
    """A zip of the files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()
