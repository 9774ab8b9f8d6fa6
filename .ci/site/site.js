// What the pages add for readers: tables that scroll and can be downloaded, contents on a narrow screen.
// No network: everything is made of what the page holds.
(() => {
  "use strict";
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const page = (location.pathname.split("/").pop() || "index.html").replace(/\.html$/, "");
  const make = (tag, attributes = {}) => Object.assign(document.createElement(tag), attributes);

  // ---- tables: a box that scrolls; a wide or long one can be taken along as CSV
  const cell = (text) => (/[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text);
  const csv = (table) => all("tr", table).map((row) => all("th, td", row).map((c) => cell(c.textContent.trim())).join(",")).join("\n") + "\n";
  all("main table").forEach((table, number) => {
    const columns = Math.max(0, ...all("tr", table).map((row) => row.children.length));
    const box = make("div", { className: "table-box", tabIndex: 0 });
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", `Table ${number + 1}`);
    table.before(box);
    box.append(table);
    box.classList.toggle("many-rows", table.rows.length > (columns > 6 ? 15 : 40));
    table.classList.toggle("many-columns", columns > 6 && !table.closest(".filterable")); // those have widths of their own
    all("td", table).forEach((c) => {
      c.classList.toggle("long", c.textContent.length > 40);
      c.classList.toggle("short", c.textContent.length < 20);
    });
    if (columns < 5 && table.rows.length < 12) return;
    const link = make("a", { className: "table-csv", textContent: "CSV", download: `${page}-${number + 1}.csv`,
      title: "Download this table as CSV", href: "#" });
    link.addEventListener("click", () => { link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(csv(table)); });
    box.after(link);
  });

  // ---- a link to something that stands folded opens it
  const unfold = () => {
    let target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let e = target; e; e = e.parentElement) if (e.matches("details.folded")) e.open = true;
    if (target && target.closest("details.folded")) target.scrollIntoView();
  };
  addEventListener("hashchange", unfold);
  unfold();

  // ---- contents of the page where there is no margin for them
  const contents = document.querySelector("#TOC ul");
  const title = document.querySelector("main .page-tools") || document.querySelector("main header");
  if (contents && title) {
    const folded = make("details", { className: "contents-here" });
    const list = contents.cloneNode(true);
    all("[id]", list).forEach((e) => e.removeAttribute("id"));
    folded.append(make("summary", { textContent: "On this page" }), list);
    list.addEventListener("click", () => { folded.open = false; });
    title.after(folded);
  }

  // ---- the search of the built-in renderer folds away on a phone: it moves under the bar
  const search = document.querySelector(".smalldocs-search"), bar = document.querySelector(".quarto-secondary-nav");
  if (search && bar) {
    const home = search.parentElement, narrow = window.matchMedia("(max-width: 991.98px)");
    const settle = () => (narrow.matches ? bar : home).append(search);
    narrow.addEventListener("change", settle);
    settle();
  }
})();
