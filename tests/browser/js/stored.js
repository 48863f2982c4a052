// The conversations that the browser keeps.
() => new Promise((resolve) => {
  const opening = indexedDB.open("lowlat", 1);
  opening.onsuccess = () => {
    const table = opening.result.transaction("conversations").objectStore("conversations");
    table.getAll().onsuccess = (event) => {
      opening.result.close();
      resolve(event.target.result);
    };
  };
})
